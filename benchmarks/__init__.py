"""Each command of this package measures or computes figures of speed, memory and plans that the
README and docs/ quote.
"""
