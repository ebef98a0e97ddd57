"""BYOL's model: two networks, one prediction loss (section 3.1 and algorithm 1 of the paper)."""

import tensorflow as tf

from byol_tf.classifier import linear_classifier, loss_and_accuracy
from byol_tf.distribution import all_reduce, of_all_replicas
from byol_tf.keras_api import keras
from byol_tf.resnet import mlp
from byol_tf.target_update import TargetNetworkUpdate


def l2_normalize(vectors):
    """float [B, D] -> float32 [B, D] of length 1: x * rsqrt(max(sum x^2, 1e-12))."""
    vectors = tf.cast(vectors, tf.float32)
    squared_norm = tf.reduce_sum(tf.square(vectors), -1, keepdims=True)
    return vectors * tf.math.rsqrt(tf.maximum(squared_norm, 1e-12))


def prediction_loss(prediction, target_projection, stop_gradient=True):
    """Equation 2 of the paper: the squared distance of the two on the unit sphere, 2 - 2 cos.

    Args:
      prediction: q(z) of the online network, float [B, D].
      target_projection: z' of the target network, float [B, D]; gets no gradient.
      stop_gradient: False lets the target have one too, where it is the online network's.

    Returns:
      float32 [B], the loss of one order of the two views.
    """
    if stop_gradient:
        target_projection = tf.stop_gradient(target_projection)
    difference = l2_normalize(prediction) - l2_normalize(target_projection)
    return tf.reduce_sum(tf.square(difference), -1)


def contrastive_loss(prediction, same_view, other_view, temperature):
    """The negative pairs of InfoNCE, which BYOL leaves out (section 5, equation 8).

    2 a ln(sum over j != i of exp(S(v_i, v_j) / a) + sum over j of exp(S(v_i, v'_j) / a)), with
    S the cosine of a prediction and a target projection. Negatives are all images of the
    global batch.

    Args:
      prediction: of one view, float [B, D].
      same_view, other_view: target projections of the same images in this view and in the
        other, float [B, D].
      temperature: a > 0.

    Returns:
      float32 [B], to be weighted by beta and added to `prediction_loss`.
    """
    size = tf.shape(prediction)[0]
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    own = replica * size + tf.range(size)
    negatives = [of_all_replicas(l2_normalize(z)) for z in (same_view, other_view)]
    similarity = tf.matmul(l2_normalize(prediction), tf.concat(negatives, 0), transpose_b=True)
    itself = tf.one_hot(own, tf.shape(similarity)[1], on_value=similarity.dtype.min, off_value=0.0)
    logits = similarity / temperature + itself
    return 2.0 * temperature * tf.reduce_logsumexp(logits, -1)


def projection_std(projections):
    """How far the normalised projections spread: 1 on a uniform sphere, 0 when collapsed.

    The standard deviation over the global batch, averaged over the D dimensions, times sqrt(D)
    (SimSiam, section 4.1, watches the same). projections: float [B, D], of this replica.
    """
    z = _centred(l2_normalize(projections))
    variances = all_reduce("MEAN", tf.reduce_mean(tf.square(z), 0))
    return tf.reduce_mean(tf.sqrt(variances)) * tf.sqrt(float(z.shape[-1]))


def effective_rank(representations):
    """How many directions the representation really uses, from 1 to D or the batch less 1.

    The participation ratio (sum of eigenvalues)^2 / sum of squared eigenvalues of the global
    batch's covariance: one matmul, no decomposition, so that it can be watched at every step.
    representations: float [B, D], of this replica.
    """
    x = _centred(tf.cast(representations, tf.float32))
    batch = (x.shape[0] or 0) * tf.distribute.get_strategy().num_replicas_in_sync
    if 0 < batch < x.shape[1]:  # the smaller of two matrices of the same eigenvalues but for 0
        x = of_all_replicas(x)
        gram = tf.matmul(x, x, transpose_b=True)
    else:
        gram = all_reduce("SUM", tf.matmul(x, x, transpose_a=True))
    return tf.math.divide_no_nan(tf.square(tf.linalg.trace(gram)), tf.reduce_sum(tf.square(gram)))


def _centred(x):
    """Less the mean of the global batch. x: float [B, D], of this replica."""
    return x - all_reduce("MEAN", tf.reduce_mean(x, 0))


def unpack_views(batch, augment=None):
    """The dict of views from what `fit` hands over, augmented where that is done in the step."""
    batch, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
    return batch if augment is None else augment(batch)


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
      projector_depth, predictor_depth: their linear layers (2 and 2 in the paper).
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
      accumulation_steps: the gradient is averaged over so many parts of the batch, each with
        batch statistics of its own, before the optimizer's step (figure 3a).
      use_predictor, use_target, contrastive_weight, temperature: the ablations of table 5b.
        Without predictor the projection itself is compared; without target network it is
        compared with the online projection, which then has a gradient as well; the weight
        is beta of equation 8. Neither of both and a weight of 1 is SimCLR.

    Raises:
      ValueError: if the encoder does not give one vector an image or cannot be cloned, or a
        depth or accumulation_steps is below 1.
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
        projector_depth=2,
        predictor_depth=2,
        accumulation_steps=1,
        use_predictor=True,
        use_target=True,
        contrastive_weight=0.0,
        temperature=0.1,
        name="byol",
    ):
        super().__init__(name=name)
        if min(projector_depth, predictor_depth, accumulation_steps) < 1:
            raise ValueError(
                f"projector_depth={projector_depth}, predictor_depth={predictor_depth} and "
                f"accumulation_steps={accumulation_steps} must all be at least 1."
            )
        self.accumulation_steps = accumulation_steps
        self.use_target = use_target
        self.contrastive_weight = contrastive_weight
        self.temperature = temperature

        def head(head_name, input_size, depth):
            return mlp(
                head_name,
                input_size,
                [projector_hidden_size] * (depth - 1) + [projector_output_size],
                synchronized_batch_norm=synchronized_batch_norm,
            )

        embedding_size = _embedding_size(encoder)
        self.online_encoder = encoder
        self.online_projector = head("online_projector", embedding_size, projector_depth)
        self.predictor = None
        if use_predictor:
            self.predictor = head("predictor", projector_output_size, predictor_depth)
        self.target_encoder = target_encoder or _clone(encoder)
        self.target_projector = head("target_projector", embedding_size, projector_depth)
        self.classifier = None
        if num_classes:
            self.classifier = linear_classifier(embedding_size, num_classes)
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
        batch = unpack_views(batch, self.augment)
        gradients = []
        for part in self._parts(batch):
            with tf.control_dependencies(gradients[-1] if gradients else []):
                target_projections = self._target_projections(part, training=True)
                with tf.GradientTape() as tape:
                    logs = self._loss_logs(part, target_projections, training=True)
                    # Keras sums the gradients of the replicas; the paper averages over the batch.
                    replica_loss = logs["loss"] / self.distribute_strategy.num_replicas_in_sync
                gradients.append(tape.gradient(replica_loss, self.trainable_variables))
            self._update_means(logs)
        mean_gradients = [tf.add_n(parts) / len(parts) for parts in zip(*gradients)]
        self.optimizer.apply_gradients(zip(mean_gradients, self.trainable_variables))
        return self._mean_logs()

    def test_step(self, batch):
        """The same loss on held-out views, for `evaluate`; both networks in inference mode."""
        batch = unpack_views(batch, self.augment)
        target_projections = self._target_projections(batch, training=False)
        self._update_means(self._loss_logs(batch, target_projections, training=False))
        return self._mean_logs()

    def _parts(self, batch):
        """The parts of a batch whose gradients are averaged, in a list.

        Every so-many-th image, not neighbours: then each part is of the same images of the global
        batch, whatever the number of replicas.
        """
        if self.accumulation_steps == 1:
            return [batch]
        size = batch["view1"].shape[0]
        if size is None or size % self.accumulation_steps:
            raise ValueError(
                f"A batch of {size} images on each replica does not divide by "
                f"accumulation_steps={self.accumulation_steps}: choose another size, and make the "
                "data set with drop_remainder=True, so that all its batches have it."
            )
        return [
            {key: value[first :: self.accumulation_steps] for key, value in batch.items()}
            for first in range(self.accumulation_steps)
        ]

    def _target_projections(self, batch, training):
        """z' of both views. In training the target network has batch statistics of its own."""
        if not self.use_target:
            return None, None  # the online projections stand in for it
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
        prediction1, prediction2 = projection1, projection2
        if self.predictor is not None:
            prediction1 = self.predictor(projection1, training=training)
            prediction2 = self.predictor(projection2, training=training)
        if not self.use_target:
            target1, target2 = projection1, projection2

        loss = tf.reduce_mean(
            prediction_loss(prediction1, target2, stop_gradient=self.use_target)
            + prediction_loss(prediction2, target1, stop_gradient=self.use_target)
        )
        logs = {
            "prediction_loss": loss,
            "projection_std": projection_std(projection1),
            "effective_rank": effective_rank(representation1),
        }
        if self.contrastive_weight:
            loss += self.contrastive_weight * tf.reduce_mean(
                contrastive_loss(prediction1, target1, target2, self.temperature)
                + contrastive_loss(prediction2, target2, target1, self.temperature)
            )
        if self.classifier is not None:
            # The representation gets no gradient of it.
            logits = self.classifier(tf.stop_gradient(representation1))
            classifier_loss, accuracy = loss_and_accuracy(logits, batch["label"])
            loss += classifier_loss
            logs.update(classifier_loss=classifier_loss, classifier_accuracy=accuracy)
        return {"loss": loss, **logs}

    def _update_means(self, logs):
        for key, mean in self._means.items():
            mean.update_state(logs[key])

    def _mean_logs(self):
        return {key: mean.result() for key, mean in self._means.items()}

    def call(self, images, training=False):
        """The representation of images: float [B, H, W, C] -> [B, D]."""
        return self.online_encoder(images, training=training)

    # What Keras needs to know ---------------------------------------------------------

    @property
    def _online_layers(self):
        layers = [self.online_encoder, self.online_projector, self.predictor, self.classifier]
        return [layer for layer in layers if layer is not None]

    @property
    def online_weights(self):
        """All weights of the online network (and classifier), in a fixed order."""
        return [weight for layer in self._online_layers for weight in layer.weights]

    @property
    def target_weights(self):
        """All weights of the target network, BN statistics included, in a fixed order."""
        return self.target_encoder.weights + self.target_projector.weights

    @property
    def target_pairs(self):
        """(target, online) variables that the target update ties: weights, no BN statistics."""
        if not self.use_target:
            return []
        online = _learned(self.online_encoder) + _learned(self.online_projector)
        target = _learned(self.target_encoder) + _learned(self.target_projector)
        return list(zip(target, online, strict=True))

    @property
    def trainable_weights(self):
        # Setting `target.trainable = False` instead would freeze its batch statistics.
        return [w for layer in self._online_layers for w in layer.trainable_weights]

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
        # The means are those of all replicas already; Keras would sum them over the workers.
        self.distribute_reduction_method = "first"

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
