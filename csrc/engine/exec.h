// How a span is executed: the interface that tile.h and the codecs are written against.
//
// An Exec defines how the at most kTileCols elements of a span are spread over vectors of lanes,
// and does what needs more than one vector.  On a CPU one thread runs a tile and a span is 32
// vectors of 16 lanes; on a GPU a block of threads runs it, each with two vectors of 4 lanes.
//
// For a tile:
//   kSpan                       vectors of a span that one thread holds
//   kStripTiles                 tiles side by side that a pass takes together, row by row
//   kWeightsLater               whether a row's weights are written in a loop of their own
//   each(width, f)              f(i, col, n) for every vector i: its first column, its lanes that
//                               exist; the halves of a block of 32 columns have i even and odd
//   each_block<B>(width, f)     f(at) for every block of B columns; at: where one thread keeps what
//                               belongs to it; block_of<B>(i, col) is that of a vector
//   largest<B, signed>(values, at, w)   the largest |element| of that block
//   Columns                     sums over a tile's rows: once a tile begin(to, width), end(width),
//                               once a row begin_row(to), add(i, col, x)
//   RowSums                     sums of a tile's rows: begin_row(to), add(i, x),
//                               end_row(row, width)
//   RowTotals, Count            totals of a tile: begin(total); end_row or add; end(total); in
//                               RowTotals begin<whether the pass stores moments>(total, access)
//   RowDraws, make_words        draws of a row, and the words that they share, if any
//   knowing(place, f)           f(), compiled for each kind of tile that Row reads differently
//   Row<T>                      a tile's rows of T in memory: once a tile start(place, data); to
//                               read a row begin(place, data, row, width), to write one
//                               open(place, data, row, width); f32, bf16, uint(i, col, n) and
//                               put_...(i, col, n, x); end(place).  put_upper stores bits 16 to 31
//                               of x, put_u8 those below 8
//   Bits                        the same for one bit per column, lowest first
//   PerBlock<T, B>              for a number for each block of B columns: start(place, data), once
//                               a row begin(place, data, row); load(at), store(at, x, width)
//   AlongRows                   a vector that runs along the rows: once a tile start(place, vector,
//                               moment), once a row begin(place, row) gives its element
//   AlongColumns                a vector's part of a tile: begin_tile, begin_row, load(i, col, n)
//   Kept                        a number for each of a tile's columns, by vector i: put, load
//   prefetch(row, cols, col)    a hint: column col of a later row will be read
//   total(x)                    the sum over a span's lanes
//   each_sample(first, every, width, grad, weight, f)
//                               some elements of a row: f(at, col, n, g, w)
//   Spread                      two sums of those over a tile: add(col, every, n, x, y),
//                               total(x, y)
//
// For a tensor:
//   each_index, each_pack       f(i), or f(at, n) for a pack of n lanes, of vectors of any length
//   each_run, largest_of, each_pack_of_run   the same by blocks
//   sum_of(length, f)           in fp64: 32 partial sums of every 32nd element, then by halves
//
// leads() says whether this thread writes single values (those of a run: leads_warp()); sync()
// makes what threads have written visible to each other.
#pragma once

#if defined(ENGINE_CUDA)
#include "engine/exec_cuda.h"
#else
#include "engine/exec_cpu.h"
#endif
