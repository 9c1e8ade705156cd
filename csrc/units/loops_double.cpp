// All likelihoods' loops over a tile, in double.
#include "likelihood_loops.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

template const Loops<double>& loops<double>(int);

}  // namespace FASTVAE_ISA
}  // namespace fastvae
