"""CLIP: embeddings of images and prompts, and the file of them."""

from common import compute, files, imagefolder, models, stage
from common.files import InputError
from common.pixels import Pixels, ahead

np = stage.lazy("numpy")
torch = stage.lazy("torch")

EMBEDDINGS = "embeddings.npz"  # of data/embed.py


class Clip:
    """CLIP's two towers: embeddings of unit length, (N, D) float32 on the CPU.

    Between rest() and the next image or text it is not on the device.
    """

    def __init__(self, name, device):
        from transformers import CLIPModel, CLIPProcessor

        def read(name):
            return CLIPModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)

        self.device, model = device, models.load_model(read, name, "--clip")
        self.model = model.to(device).eval().requires_grad_(False)
        self.processor = models.load_model(CLIPProcessor.from_pretrained, name, "--clip")
        self.size = self.model.config.vision_config.image_size  # of images, in pixels
        self.width = self.model.config.projection_dim  # D

    def rest(self):
        """Makes room on the device: CLIP ViT-L/14 takes 1.7 GB."""
        self.model.to("cpu")

    def images(self, images):
        """images: a list of (3, S, S) uint8 tensors, or of PIL images."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        found = self.model.to(self.device).vision_model(pixels.to(self.device)).pooler_output
        return _unit_length(self.model.visual_projection(found))

    def texts(self, texts):
        tokens = self.processor(text=texts, padding="max_length", return_tensors="pt")
        limit = self.model.config.text_config.max_position_embeddings
        if tokens["input_ids"].shape[1] > limit:
            raise InputError("metadata.csv", f"a text is too long for CLIP, one of {texts}",
                             "shorten it")
        found = self.model.to(self.device).text_model(**tokens.to(self.device)).pooler_output
        return _unit_length(self.model.text_projection(found))

    def probabilities(self, images, texts):
        """Zero-shot classification (Radford et al. 2021, section 3.1), from embeddings of both.

        The probability of each of M texts for each of N images, (N, M) float32.
        """
        scale = self.model.logit_scale.exp().cpu()
        return (scale * torch.as_tensor(images) @ texts.T).softmax(1)


def _unit_length(embeddings):
    return torch.nn.functional.normalize(embeddings.float(), dim=1).cpu()


def embed_images(encoder, folder, rows, batch, cache):
    """Embeddings of the images of some rows of metadata, (N, D) float32 array.

    Where several processes share the work, of this one's part of the batches. cache: see
    common/pixels.py.
    """
    pixels = Pixels(folder, rows, encoder.size, cache)
    batches = compute.share(torch.arange(len(rows)).split(batch))
    batches = imagefolder.progress(batches, f"embed {folder}", "batch")
    found = [encoder.images(list(images)) for images in ahead(pixels.__getitem__, batches)]
    return torch.cat(found).numpy() if found else np.empty((0, 0), np.float32)


def save_embeddings(folder, rows, embeddings):
    """Writes folder/embeddings.npz: file names, and their embeddings, (N, D) float32."""
    names = np.array([row["file_name"] for row in rows])
    with open(folder / EMBEDDINGS, "wb") as file:
        np.savez(file, file_name=names, embedding=embeddings)


def read_embeddings(folder, rows, clip=None):
    """The embeddings of the images of some rows, (N, D) float32 array.

    Raises InputError if one is missing, or if they cannot be those of `clip`, if that is given.
    """
    path, again = folder / EMBEDDINGS, "run data/embed.py for this --data and --clip"
    try:
        with np.load(path) as file:
            embeddings, names = file["embedding"], file["file_name"].tolist()
        finite = np.isfinite(embeddings).all()
        if embeddings.shape != (len(names), embeddings.shape[-1]) or not finite:
            raise ValueError("it does not hold a finite embedding for each file_name")
    except Exception as error:  # OSError, ValueError, EOFError, KeyError, BadZipFile, ...
        raise InputError(path, f"cannot be read: {files.reason(error)}", again) from None
    places = {name: i for i, name in enumerate(names)}
    missing = [row["file_name"] for row in rows if row["file_name"] not in places]
    if missing:
        raise InputError(path, f"does not contain {len(missing)} of {len(rows)} images, the first "
                         f"is {missing[0]}", again)
    if clip and embeddings.shape[1] != clip.width:
        raise InputError(path, f"holds embeddings of {embeddings.shape[1]} numbers, those of CLIP "
                         f"have {clip.width}", again)
    return embeddings[[places[row["file_name"]] for row in rows]]


def embeddings_digest(folder):
    there = (folder / EMBEDDINGS).is_file()
    return files.file_digests(folder, [EMBEDDINGS]) if there else None
