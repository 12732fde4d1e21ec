"""Where does the state of what is trained lie, and in which formats?"""
