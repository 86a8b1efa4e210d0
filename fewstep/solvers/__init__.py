"""Training-free few-step recipes: step grids and solver coefficients fitted to a teacher."""
