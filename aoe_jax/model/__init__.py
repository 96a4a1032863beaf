"""The language model: decoder, attention, loss, decoding."""
