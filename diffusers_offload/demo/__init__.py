"""Real Diffusers pipelines with random weights, for trying the plugin without downloading anything."""
