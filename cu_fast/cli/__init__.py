"""The command ``cu-fast``: app.py is where it starts, with the commands on this machine; models.py: those on a model;
sae.py: those on a released autoencoder.

options.py holds choices and shared options, tables.py and terminal.py print; demo.py, verify.py, serve.py and verify_server.py
do a command's work.
"""
