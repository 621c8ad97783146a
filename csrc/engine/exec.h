// Who runs a span: the interface that tile.h and the codecs are written against.
//
// An Exec says how the at most kTileCols elements of a span are spread over vectors of lanes, and
// does what needs more than one lane.  On a CPU one thread runs a tile and a span is 32 vectors of
// 16 lanes; on a GPU a block of threads runs it, every thread being one lane of kTileCols / threads
// vectors.
//
//   kSpan                       vectors of a span that one thread holds
//   each(width, f)              f(i, col, n) for every vector i: its first column, its lanes
//   largest<B>(values, b, width)  the largest |element| of the b-th block of B columns
//   put_sum(to, x), total(x)    the sum over a span's lanes, stored or returned to the leader
//   Columns                     sums over rows: begin(to, width), add(i, col, x), end(width)
//   load_bits, store_bits       one bit a column, lowest first
//   prefetch(row, cols, col)    a hint: column col of a later row will be read
//   leads()                     whether this thread writes what exists once
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "engine/exec_cuda.h"
#else
#include "engine/exec_cpu.h"
#endif
