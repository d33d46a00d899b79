# Nothing of this module is for Python: see its .pxd.
