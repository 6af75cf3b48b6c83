"""What finds the fastest plan by measurement: cost model and plan store."""
