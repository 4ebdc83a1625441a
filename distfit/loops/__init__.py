"""Hand-written loops: everything that `distfit.fit` has, for steps that a user wrote with tf.GradientTape."""
