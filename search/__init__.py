"""What finds the fastest plan: cost model, simulator, search space, measurement and plan store."""
