"""A data owner's side of differential privacy: what updates lose before they leave, what it costs, what is left."""
