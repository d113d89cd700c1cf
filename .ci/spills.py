"""Fails if a kernel spills registers, unless .ci/spills_allowed.txt lists it with a reason, or if
ptxas says that it waits between wgmma instructions: "serialized", or (C7519) across branches, where
a shared commit makes each wait drain the products just issued.

    python .ci/spills.py BUILD_LOG

BUILD_LOG holds ptxas -v output of every translation unit.
"""

import pathlib
import re
import sys

ALLOWED = pathlib.Path(__file__).with_name("spills_allowed.txt")


def main(log: str) -> int:
    text = pathlib.Path(log).read_text()
    allowed = [
        line.split("|")[0].strip()
        for line in ALLOWED.read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    kernels = re.findall(
        r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores", text
    )
    bad = [
        (name, int(spilled))
        for name, spilled in kernels
        if int(spilled) and not any(pattern in name for pattern in allowed)
    ]
    serialized = re.findall(r"Potential Performance Loss: wgmma.*|.*\(C7519\).*", text)
    print(f"{len(kernels)} kernels compiled, {len(bad)} spill, {len(serialized)} serialize wgmma")
    for name, spilled in bad:
        print(f"  {name}: {spilled} bytes")
    for line in serialized:
        print(f"  {line}")
    return 1 if bad or serialized else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
