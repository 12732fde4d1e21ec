"""What changes in a run of MISA, who owns it, and how does it follow what others do?"""
