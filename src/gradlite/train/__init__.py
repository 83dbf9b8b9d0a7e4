"""Training: configuration, data, models, and the run itself."""

from gradlite.methods.packages import hold_back_torchao_lines

hold_back_torchao_lines()  # before transformers is imported
