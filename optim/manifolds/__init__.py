"""Parameters whose rows are points of a manifold: closed forms of the manifolds, and Adam on them."""
