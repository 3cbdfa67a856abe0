"""Pages: what a report says, and what a terminal cannot show, as one HTML file without a network.

A report becomes a `Page` (`of_inspect`, `of_folder`, `of_compare` …: blocks of data, no markup),
and `render` makes a file of it.  No torch here.
"""
