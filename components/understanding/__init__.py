"""Training data -> is this problem a Markov decision process at all?"""
