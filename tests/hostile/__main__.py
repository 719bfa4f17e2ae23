"""`python -m hostile`: the server that runs commands in forked children."""

from hostile import serve

serve()
