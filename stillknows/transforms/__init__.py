"""Plug-ins that change what is asked: compression, as deployment does it, defences and attacks."""
