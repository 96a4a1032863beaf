"""The commands of this package measure or compute numbers that README, docs/ and results/ quote;
the command `soak` tests that training survives interruptions.
"""
