"""How a launch is shaped: tiles, chunks, operands."""
