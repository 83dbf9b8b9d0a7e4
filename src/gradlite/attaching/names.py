"""Names under which attaching registers things on modules."""

COORDINATES = "gradlite_coordinates"
GATE_UP_COORDINATES = "gradlite_gate_up_coordinates"
DOWN_COORDINATES = "gradlite_down_coordinates"
RESIDUAL_NORM = "gradlite_residual_norm"
CHAIN = "gradlite_chain"
