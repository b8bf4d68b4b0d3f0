"""The command line: one thin file per verb that reads arguments, makes one or two calls and
prints."""
