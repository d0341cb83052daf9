"""The command ``cu-fast``: app.py reads its options, tables.py prints; demo.py and verify.py are two of its commands."""
