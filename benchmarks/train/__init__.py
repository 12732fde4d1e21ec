"""How fast is a whole training iteration with MISA and with its peers, and what memory does it take?"""
