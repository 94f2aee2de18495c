"""One module a verb: its docstring is the help, `define_flags` its flags, `run` what it does."""
