// `fuseformer._host`: what was compiled, for Python to ask; neither torch nor CUDA is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention/tiles.h"
#include "feed_forward/tiles.h"

#if !defined(FUSEFORMER_ARCHS)
#define FUSEFORMER_ARCHS ""
#endif

namespace py = pybind11;

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  m.doc() = "What the CUDA C++ kernels of this installation are.";
  m.def(
      "architectures", [] { return std::string(FUSEFORMER_ARCHS); },
      "Return the GPU architectures that were compiled, as FUSEFORMER_ARCHS names them.");
  m.def(
      "tiles",
      [] {
        std::vector<fuseformer::TileRow> tiles = fuseformer::attention_tiles();
        for (const auto& tile : fuseformer::feed_forward_tiles()) tiles.push_back(tile);
        py::list rows;
        for (const auto& tile : tiles) {
          py::dict row;
          row["kernel"] = tile.kernel;
          row["size"] = tile.size;
          row["block_m"] = tile.block_m;
          row["block_n"] = tile.block_n;
          row["threads"] = tile.threads;
          row["stages"] = tile.stages;
          row["shared_bytes"] = tile.shared_bytes;
          rows.append(row);
        }
        return rows;
      },
      "Return the tiles of the kernels: the head dim, model width or number of first products that "
      "they are for, rows and columns of a tile, threads, stages, and bytes of dynamic shared "
      "memory of a block.");
}
