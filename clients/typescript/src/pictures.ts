import { create } from "@bufbuild/protobuf";
import { FacelaneError } from "./errors.js";
import { PictureEncoding, PictureSchema, type Picture } from "./gen/facelane/v1/face_pb.js";

/** The bytes of a JPEG, PNG or WebP, or a picture that says what it is (raw pixels, access units of video). */
export type PictureInput = Uint8Array | Picture;

/** The picture for bytes that say what they are. */
export function pictureOf(given: PictureInput): Picture {
  if (!(given instanceof Uint8Array)) return given;
  return create(PictureSchema, { encoding: encodingOf(given), data: given });
}

function encodingOf(bytes: Uint8Array): PictureEncoding {
  const begins = (...wanted: number[]): boolean => wanted.every((byte, n) => bytes[n] === byte);
  if (begins(0xff, 0xd8)) return PictureEncoding.JPEG;
  if (begins(0x89, 0x50, 0x4e, 0x47)) return PictureEncoding.PNG;
  if (begins(0x52, 0x49, 0x46, 0x46)) return PictureEncoding.WEBP;
  throw new FacelaneError("PICTURE_UNSUPPORTED", "neither JPEG, PNG nor WebP: give a Picture with its encoding");
}
