"""The routes by which candidates run: the whole model in one program, or a program for each layer. A route is a module
with the functions of `populations.Route`."""
