"""Networks on the Lorentz model of hyperbolic space, their Euclidean twins, and graph tasks to train them on."""
