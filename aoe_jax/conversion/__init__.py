"""Makes another model of a trained one: exported, an AoE of a router, upcycled, pruned."""
