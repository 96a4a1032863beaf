"""What a mesh of devices adds to the layer: collectives, and how rows travel."""
