"""Transfer: weights from other networks, and weights for them."""
