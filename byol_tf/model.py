"""BYOL's model: two networks, one prediction loss (section 3.1 and algorithm 1 of the paper)."""

import tensorflow as tf

from byol_tf.keras_api import keras
from byol_tf.resnet import kernel_initializer, mlp
from byol_tf.target_update import TargetNetworkUpdate


def l2_normalize(vectors):
    """float [B, D] -> float32 [B, D] of length 1: x * rsqrt(max(sum x^2, 1e-12))."""
    vectors = tf.cast(vectors, tf.float32)
    squared_norm = tf.reduce_sum(tf.square(vectors), -1, keepdims=True)
    return vectors * tf.math.rsqrt(tf.maximum(squared_norm, 1e-12))


def prediction_loss(prediction, target_projection):
    """Equation 2 of the paper: the squared distance of the two on the unit sphere, 2 - 2 cos.

    Args:
      prediction: q(z) of the online network, float [B, D].
      target_projection: z' of the target network, float [B, D]; gets no gradient.

    Returns:
      float32 [B], the loss of one order of the two views.
    """
    target_projection = tf.stop_gradient(target_projection)
    difference = l2_normalize(prediction) - l2_normalize(target_projection)
    return tf.reduce_sum(tf.square(difference), -1)


def projection_std(projections):
    """How far the normalised projections spread: 1 on a uniform sphere, 0 when collapsed.

    The standard deviation over the batch, averaged over the D dimensions, times sqrt(D)
    (SimSiam, section 4.1, watches the same). projections: float [B, D].
    """
    z = l2_normalize(projections)
    return tf.reduce_mean(tf.math.reduce_std(z, 0)) * tf.sqrt(float(z.shape[-1]))


def effective_rank(representations):
    """How many directions the representation really uses, from 1 to min(B - 1, D).

    The participation ratio (sum of eigenvalues)^2 / sum of squared eigenvalues of the
    batch's covariance, from the Gram matrix: two matmuls, no decomposition, so that it can
    be watched at every step. representations: float [B, D].
    """
    x = tf.cast(representations, tf.float32)
    x -= tf.reduce_mean(x, 0)
    gram = tf.matmul(x, x, transpose_b=True)
    return tf.math.divide_no_nan(tf.square(tf.linalg.trace(gram)), tf.reduce_sum(tf.square(gram)))


class BYOL(keras.Model):
    """Bootstrap Your Own Latent (Grill et al. 2020) around any image encoder.

    Train it with `fit` on a dataset of dicts and the callback
    `byol_tf.TargetNetworkUpdate`:

    * "view1", "view2": float32 [B, H, W, C], two augmented views of each image,
    * "label": int64 [B], optional; feeds the online linear classifier. -1: no label.

    Args:
      encoder: a `keras.Model` from images [B, H, W, C] to a vector [B, D]. The online
        encoder f_theta; after training it is what you keep.
      projector_hidden_size, projector_output_size: of projector and predictor (4096 and
        256 in the paper, section 3.3).
      num_classes: with a number, trains a linear classifier on the online representation
        of view 1, gradient stopped: its accuracy is logged, the encoder never feels it.
      augment: optional function of a batch that returns the dict above; it runs inside the
        step, on the accelerator.
      target_encoder: the target encoder f_xi; by default a copy of the encoder's
        structure. Needed only for subclassed encoders that cannot be cloned.
      random_target: start the target network from its own random draw, as DeepMind's
        reference does, rather than from the online weights.
      synchronized_batch_norm: share the heads' batch statistics across replicas; by
        default where the current strategy has more than one. An encoder from elsewhere, as
        of `keras.applications`, keeps its own kind of batch norm.

    Raises:
      ValueError: if the encoder does not give one vector an image or cannot be cloned.
    """

    def __init__(
        self,
        encoder,
        *,
        projector_hidden_size=4096,
        projector_output_size=256,
        num_classes=None,
        augment=None,
        target_encoder=None,
        random_target=False,
        synchronized_batch_norm=None,
        name="byol",
    ):
        super().__init__(name=name)

        def head(head_name, input_size):
            return mlp(
                head_name,
                input_size,
                projector_hidden_size,
                projector_output_size,
                synchronized_batch_norm=synchronized_batch_norm,
            )

        embedding_size = _embedding_size(encoder)
        self.online_encoder = encoder
        self.online_projector = head("online_projector", embedding_size)
        self.predictor = head("predictor", projector_output_size)
        self.target_encoder = target_encoder or _clone(encoder)
        self.target_projector = head("target_projector", embedding_size)
        self.classifier = None
        if num_classes:
            self.classifier = keras.layers.Dense(
                num_classes,
                kernel_initializer=kernel_initializer(),
                dtype="float32",
                name="classifier",
            )
            self.classifier.build((None, embedding_size))
        if not random_target:
            self.target_encoder.set_weights(encoder.get_weights())
            self.target_projector.set_weights(self.online_projector.get_weights())
        self.augment = augment
        self._means = {
            key: keras.metrics.Mean(key)
            for key in ("loss", "prediction_loss", "projection_std", "effective_rank")
        }
        if self.classifier is not None:
            self._means["classifier_loss"] = keras.metrics.Mean("classifier_loss")
            self._means["classifier_accuracy"] = keras.metrics.Mean("classifier_accuracy")
        self.built = True

    # The method -----------------------------------------------------------------------

    def train_step(self, batch):
        """One step of algorithm 1, without its last line: the target moves in the callback."""
        batch = self._views(batch)
        target_projections = self._target_projections(batch, training=True)
        with tf.GradientTape() as tape:
            logs = self._loss_logs(batch, target_projections, training=True)
            # Keras sums the gradients of the replicas; the paper averages over the batch.
            replica_loss = logs["loss"] / self.distribute_strategy.num_replicas_in_sync
        variables = self.trainable_variables
        gradients = tape.gradient(replica_loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables))
        return self._mean_logs(logs)

    def test_step(self, batch):
        """The same loss on held-out views, for `evaluate`; both networks in inference mode."""
        batch = self._views(batch)
        target_projections = self._target_projections(batch, training=False)
        return self._mean_logs(self._loss_logs(batch, target_projections, training=False))

    def _target_projections(self, batch, training):
        """z' of both views. In training the target network has batch statistics of its own."""
        return [
            self.target_projector(self.target_encoder(view, training=training), training=training)
            for view in (batch["view1"], batch["view2"])
        ]

    def _loss_logs(self, batch, target_projections, training):
        """The loss of a batch, averaged over its images, and what is logged beside it."""
        target1, target2 = target_projections
        representation1 = self.online_encoder(batch["view1"], training=training)
        representation2 = self.online_encoder(batch["view2"], training=training)
        projection1 = self.online_projector(representation1, training=training)
        projection2 = self.online_projector(representation2, training=training)
        prediction1 = self.predictor(projection1, training=training)
        prediction2 = self.predictor(projection2, training=training)

        loss = tf.reduce_mean(
            prediction_loss(prediction1, target2) + prediction_loss(prediction2, target1)
        )
        logs = {
            "prediction_loss": loss,
            "projection_std": projection_std(projection1),
            "effective_rank": effective_rank(representation1),
        }
        if self.classifier is not None:
            classifier_logs = self._classify(representation1, batch["label"])
            loss += classifier_logs["classifier_loss"]
            logs.update(classifier_logs)
        return {"loss": loss, **logs}

    def _views(self, batch):
        """The dict of views from what `fit` hands over, augmented where that is done here."""
        batch, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        return batch if self.augment is None else self.augment(batch)

    def _mean_logs(self, logs):
        for key, mean in self._means.items():
            mean.update_state(logs[key])
        return {key: mean.result() for key, mean in self._means.items()}

    def _classify(self, representation, labels):
        """Loss and accuracy of the linear classifier; the representation gets no gradient."""
        logits = self.classifier(tf.stop_gradient(representation))
        known = tf.cast(labels >= 0, tf.float32)  # -1: an image without label
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(labels, 0), logits)
        correct = tf.cast(tf.equal(tf.argmax(logits, -1), tf.cast(labels, tf.int64)), tf.float32)
        count = tf.reduce_sum(known)
        return {
            "classifier_loss": tf.math.divide_no_nan(tf.reduce_sum(losses * known), count),
            "classifier_accuracy": tf.math.divide_no_nan(tf.reduce_sum(correct), count),
        }

    def call(self, images, training=False):
        """The representation of images: float [B, H, W, C] -> [B, D]."""
        return self.online_encoder(images, training=training)

    # What Keras needs to know ---------------------------------------------------------

    @property
    def online_weights(self):
        """All weights of the online network (and classifier), in a fixed order."""
        layers = [self.online_encoder, self.online_projector, self.predictor, self.classifier]
        return [weight for layer in layers if layer is not None for weight in layer.weights]

    @property
    def target_weights(self):
        """All weights of the target network, BN statistics included, in a fixed order."""
        return self.target_encoder.weights + self.target_projector.weights

    @property
    def target_pairs(self):
        """(target, online) variables that the target update ties: weights, no BN statistics."""
        online = _learned(self.online_encoder) + _learned(self.online_projector)
        target = _learned(self.target_encoder) + _learned(self.target_projector)
        return list(zip(target, online, strict=True))

    @property
    def trainable_weights(self):
        # Setting `target.trainable = False` instead would freeze its batch statistics.
        layers = [self.online_encoder, self.online_projector, self.predictor, self.classifier]
        return [w for layer in layers if layer is not None for w in layer.trainable_weights]

    @property
    def non_trainable_weights(self):
        trainable = {id(weight) for weight in self.trainable_weights}
        return [w for w in self.online_weights + self.target_weights if id(w) not in trainable]

    @property
    def metrics(self):
        return list(self._means.values())

    def compile(self, optimizer="sgd", **kwargs):
        """As `keras.Model.compile`, of which BYOL needs only the optimizer.

        Raises:
          ValueError: for steps_per_execution > 1.
        """
        if kwargs.get("steps_per_execution") not in (None, 1):
            raise ValueError(
                "steps_per_execution must be 1: the target network moves after every step, in a "
                "callback, and Keras calls callbacks only once every steps_per_execution steps."
            )
        super().compile(optimizer=optimizer, **kwargs)

    def fit(self, *args, callbacks=None, **kwargs):
        """As `keras.Model.fit`; refuses to train with a target network that never moves.

        Raises:
          ValueError: if there is no `TargetNetworkUpdate` among the callbacks.
        """
        listed = getattr(callbacks, "callbacks", callbacks) or []
        listed = listed if isinstance(listed, (list, tuple)) else [listed]
        if not any(isinstance(callback, TargetNetworkUpdate) for callback in listed):
            raise ValueError(
                "BYOL.fit needs the callback that moves the target network: "
                "callbacks=[byol_tf.TargetNetworkUpdate(base_target_ema=0.996)]."
            )
        return super().fit(*args, callbacks=callbacks, **kwargs)


def _learned(layer):
    """The variables a layer learns by gradient, frozen or not: all but BN statistics."""
    statistics = {
        id(weight)
        for sublayer in layer.submodules
        if hasattr(sublayer, "moving_mean")
        for weight in (sublayer.moving_mean, sublayer.moving_variance)
    }
    return [weight for weight in layer.weights if id(weight) not in statistics]


def _embedding_size(encoder):
    shape = getattr(encoder, "output_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 2 or shape[-1] is None:
        raise ValueError(
            f"The encoder must map images to one vector [batch, features], but its output shape "
            f"is {shape}: end it with a pooling layer (for keras.applications: "
            "include_top=False, pooling='avg')."
        )
    return shape[-1]


def _clone(encoder):
    try:
        return keras.models.clone_model(encoder, clone_function=_clone_layer)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            "The encoder cannot be cloned for the target network: pass a second one of the "
            "same structure as target_encoder=."
        ) from error


def _clone_layer(layer):
    if isinstance(layer, keras.Model):
        return keras.models.clone_model(layer, clone_function=_clone_layer)
    config = layer.get_config()
    if getattr(layer, "synchronized", False):
        config["synchronized"] = True  # which batch norm leaves out of its config
    return layer.__class__.from_config(config)
