"""Drawing charts: axes, strokes, and panels of lines with a legend.

With Pillow, which is here anyway.  A plotting library would be a large dependency for one kind of
chart, with as much code to make it look like this.
"""
