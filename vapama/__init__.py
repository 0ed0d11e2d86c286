"""vapama: is my address translation right?"""
