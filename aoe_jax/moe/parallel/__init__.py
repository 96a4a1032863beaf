"""The layer on a mesh of devices: collectives, and the transports of rows."""
