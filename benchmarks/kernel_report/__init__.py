"""Compile every kernel without a GPU and report what the compiler made of it."""
