// What test_planner.cpp checks of the weight gradients' lists of chunks.
#pragma once

#include <algorithm>
#include <set>
#include <vector>

#include "pixelfly/grad_spans.h"
#include "tests/plan_case.h"

namespace pixelfly {

inline void check_grad_list(const LayoutView& layout, const Plan& plan, const GradList& s) {
  const int32_t b = layout.block_size, sub = b / 64, ranks = tiles(layout.rank);
  const int32_t row_tiles = tiles(layout.num_rows() * b), col_tiles = tiles(layout.num_cols() * b);
  const auto* quads = plan.at<GroupQuad>(plan.header.forward.quads_offset);
  std::set<int32_t> quad_blocks;
  const auto* chunks = plan.at<GradChunk>(s.chunks_offset);
  std::set<int32_t> outputs;
  std::vector<int32_t> bias(static_cast<size_t>(row_tiles), 0);
  for (int32_t c = 0; c < s.num_chunks; ++c) {
    const GradChunk& chunk = chunks[c];
    expect(chunk.num_tiles <= kGradTiles, "tiles fit");
    expect(chunk.num_tiles <= std::max(s.most_tiles, 2 * kGradBias), "tiles of the largest chunk");
    expect(chunk.num_outputs[0] + chunk.num_outputs[1] <= s.most_outputs, "and its outputs");
    for (int w = 0; w < 2; ++w) {
      expect(chunk.num_bias[w] <= kGradBias, "sums fit");
      for (int32_t i = 0; i < chunk.num_bias[w]; ++i) {
        const int32_t tile = chunk.tile[chunk.bias[w][i]];
        expect((tile & 3) == kGradDz, "dbias is a sum of dz");
        ++bias[static_cast<size_t>(tile >> 2)];
      }
    }
    for (int w = 0; w < 2; ++w) {
      expect(chunk.num_outputs[w] <= kGradOutputs, "outputs fit");
      expect(std::find(std::begin(kGradSizes), std::end(kGradSizes), chunk.sizes[w]) !=
                 std::end(kGradSizes),
             "sizes that the kernel has");
      const GradRun* run = chunk.run[w];
      for (int32_t o = 0, place = 0, sizes = 0; o < chunk.num_outputs[w]; ++o, ++place) {
        if (place == run->size) ++run, place = 0;
        if (place == 0) sizes = sizes * 10 + run->size;
        const int32_t slot = run->first + place * run->step;
        expect(slot < chunk.num_tiles && run->row < chunk.num_tiles, "output uses loaded tiles");
        const int32_t row_tile = chunk.tile[run->row], col_tile = chunk.tile[slot];
        const int32_t row = (row_tile >> 2) + ((row_tile & 3) == kGradS ? row_tiles : 0);
        const int32_t col = (col_tile >> 2) + ((col_tile & 3) == kGradT ? col_tiles : 0);
        expect((row_tile & 3) <= kGradS && (col_tile & 3) >= kGradX, "a row times a column");
        if (o + 1 == chunk.num_outputs[w]) expect(sizes == chunk.sizes[w], "runs have the sizes");
        const int32_t output = chunk.output[w][o], index = output & kGradIndexMask;
        expect(outputs.insert(output).second, "a gradient tile twice");
        if (output >= kGradDv) {
          expect(row == row_tiles + index % ranks && col == index / ranks, "dv = s' x");
        } else if (output >= kGradDu) {
          expect(col == col_tiles + index % ranks && row == index / ranks, "du = dz' t");
        } else if (b == 32) {
          for (int q = 0; q < 4; ++q) {
            const int32_t k = quads[index].block[q];
            if (k < 0) continue;
            quad_blocks.insert(k);
            expect(layout.row_idx[k] == row * 2 + q % 2 && layout.col_idx[k] == col * 2 + q / 2,
                   "a block of a quad comes from its row and column");
          }
        } else {
          const int32_t k = index / (sub * sub), r = index / sub % sub, q = index % sub;
          expect(k < layout.nnz() && row == layout.row_idx[k] * sub + r &&
                     col == layout.col_idx[k] * sub + q,
                 "a part of dB comes from its row and column");
        }
      }
    }
  }
  const int32_t border = ranks * (row_tiles + col_tiles);
  if (b == 32) {
    expect(static_cast<int32_t>(quad_blocks.size()) == layout.nnz(), "every block's gradient");
  } else {
    expect(static_cast<int32_t>(outputs.size()) == layout.nnz() * sub * sub + border,
           "every gradient tile");
  }
  expect(std::all_of(bias.begin(), bias.end(), [](int32_t n) { return n == 1; }),
         "every row tile is summed for dbias once");
}

inline void check_grad(const LayoutView& layout, const Plan& plan) {
  const GradSection& s = plan.header.grad;
  if (layout.block_size < 32) {
    expect(s.many.num_chunks == 0, "no weight-gradient chunks where the kernel does not serve");
    return;
  }
  check_grad_list(layout, plan, s.many);
  if (s.few.num_chunks > 0) check_grad_list(layout, plan, s.few);
}

// Few tokens are dealt to more thread blocks, many are cut into spans; whatever the model says, a
// list for few tokens is no choice for many.
inline void check_grad_choice() {
  g_case = "chunks for few tokens";
  const Plan plan(make(64, 16, 64, 0, 0, wide));
  const GradSection& s = plan.header.grad;
  expect(s.few.num_chunks > 2 * s.many.num_chunks, "smaller chunks");
  expect(s.few.most_outputs < s.many.most_outputs, "with fewer outputs");
  for (const int steps : {1, 8, 32, 64}) {
    const GradCut cut = choose_grad_cut(plan.header, steps, 132);
    expect(cut.list == &s.few && cut.spans == 1, "one span of smaller chunks");
  }
  for (const int steps : {kGradFewSteps, 512, 4096}) {
    const GradCut cut = choose_grad_cut(plan.header, steps, 132);
    expect(cut.list == &s.many && cut.spans > 1, "spans of large chunks");
  }
  // 400 products are four more than 33 chunks of twelve in four spans: of those, three spans would
  // leave a quarter of the multiprocessors idle.
  const Plan ranked(make(64, 16, 64, 64, 0, wide));
  const GradCut cut = choose_grad_cut(ranked.header, 512, 132);
  const int busy = cut.spans * cut.list->num_chunks;
  expect(cut.list->most_outputs < 12 && busy > 120 && busy <= 132, "smaller chunks, all busy");
  // Several spans take two turns of the multiprocessors at most.
  for (const int32_t rows : {80, 96, 140}) {
    const Plan large(make(rows, rows, 64, 0, 0, butterfly));
    for (const int steps : {kGradFewSteps, 512, 1024}) {
      const GradCut of = choose_grad_cut(large.header, steps, 132);
      expect(of.spans == 1 || of.spans * of.list->num_chunks <= 2 * 132, "two turns at most");
    }
  }
}

// du and dv, or a dense row and column, in chunks of their own would take a second turn of the
// multiprocessors: they lie in those that load their other tile anyway.
inline void check_grad_border() {
  g_case = "chunks with the border";
  for (const LayoutView& layout :
       {make(128, 128, 64, 64, 0, butterfly), make(128, 128, 64, 0, 0, global)}) {
    const Plan plan(layout);
    check_grad(layout, plan);
    const GradCut cut = choose_grad_cut(plan.header, kGradFewSteps, 132);
    expect(cut.spans == 1 && cut.list->num_chunks <= 128, "one turn");
    const auto* chunks = plan.at<GradChunk>(cut.list->chunks_offset);
    const bool is_low_rank = plan.header.rank > 0;
    int rows = 0, cols = 0;
    for (int32_t c = 0; c < cut.list->num_chunks; ++c) {
      // Tile 0 of a source is the source's own number.
      const int32_t* end = chunks[c].tile + chunks[c].num_tiles;
      rows += std::find(chunks[c].tile, end, is_low_rank ? kGradS : kGradDz) != end;
      cols += std::find(chunks[c].tile, end, is_low_rank ? kGradT : kGradX) != end;
    }
    expect(cols == cut.list->num_chunks, "every chunk loads t, or the dense column's x");
    expect(10 * rows > 9 * cols, "most load s, or the dense row's dz");
  }
}

}  // namespace pixelfly
