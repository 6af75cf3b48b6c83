"""Operations of a model: shapes, costs, reference maths and kernels, and the graph they form."""
