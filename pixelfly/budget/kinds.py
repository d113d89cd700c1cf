"""Which type a layer is of: attention or MLP, in or out, by the names that libraries use."""

from __future__ import annotations

import re

LAYER_TYPES = ("attention qkv", "attention out", "mlp fc1", "mlp fc2", "other")

_ATTENTION = re.compile(r"attn|attention|(^|[._])mha\b")
_QKV = re.compile(
    r"^(c_attn|q_?proj|k_?proj|v_?proj|to_(q|k|v|kv|qkv)|w?(q|k|v|kv|qkv)|in_proj|qkv_proj"
    r"|query|key|value|query_key_value|(q|k|v)_lin)$"
)
_OUT = re.compile(r"^(c_proj|proj|out_?proj|o_?proj|to_out|wo|o|out|out_lin|dense)$")
_FC1 = re.compile(r"^(fc1|fc1_[gx]|c_fc|up_proj|gate_proj|gate_up_proj|w1|w3|wi(_\d)?|lin(ear)?1)$")
_FC2 = re.compile(r"^(fc2|c_proj|down_proj|w2|lin(ear)?2)$")


def layer_type(name: str) -> str:
    """Returns the type of a linear layer, one of `LAYER_TYPES`, from its name in the model.

    Args:
        name: the layer's qualified name, as `named_modules` gives it.

    Example:
        >>> layer_type("transformer.h.3.attn.c_proj"), layer_type("transformer.h.3.mlp.c_proj")
        ('attention out', 'mlp fc2')
        >>> layer_type("head")
        'other'
    """
    # Numbers are places in a Sequential or a list: `to_out.0`.
    parts = [part for part in name.lower().split(".") if not part.isdigit()]
    if not parts:
        return "other"
    last, before = parts[-1], ".".join(parts[:-1])
    if _QKV.match(last):
        return "attention qkv"
    if _ATTENTION.search(before) and _OUT.match(last):
        return "attention out"
    if _FC1.match(last) or before.endswith("intermediate") and last == "dense":
        return "mlp fc1"
    if _FC2.match(last) or before.endswith("output") and last == "dense":
        return "mlp fc2"
    if last == "wo":  # T5's MLP; in an attention it was met above
        return "mlp fc2"
    return "other"
