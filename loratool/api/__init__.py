"""One function per command; the command line does nothing that these do not.

Every function returns the report that ``--json`` prints.  `loratool` has them all by name
(``loratool.merge``), and imports the module of the one that is asked for.
"""
