"""How things are told to people: words, clocks, commands to paste, terminals."""
