"""Every option, once: the command line, Python's keywords, recipes and provenance come from here.

`words` says what an option is, `groups` has those that commands share, `merging`, `shaping`,
`looking` and `hub` those of each command, and `calls` makes functions of them.
"""
