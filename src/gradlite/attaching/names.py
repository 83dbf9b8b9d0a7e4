"""Names under which attaching registers things on modules."""

COORDINATES = "gradlite_coordinates"
RESIDUAL_NORM = "gradlite_residual_norm"
CHAIN = "gradlite_chain"
