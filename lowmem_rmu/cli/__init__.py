"""The command line: one module per verb, plus progress, tables and errors."""
