def selftest(model, x=None, y=None):
    raise NotImplementedError
