// All likelihoods' loops over a tile, in float.
#include "likelihood_loops.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

template const Loops<float>& loops<float>(int);

int parameter_count(int likelihood) { return loops<float>(likelihood).parameters; }

}  // namespace FASTVAE_ISA
}  // namespace fastvae
