import pictureStyle from '../../styles/picture.css'
import { resolvedColour } from './shell'
import { lines } from './streams'

// Exports: the recorded messages, and the pictures with their style.

/** Saves the page as `json` (the lines of `stream`), `svg` or `png` (the visible pictures). */
export async function exportPage(format: string, title: string, stream: string): Promise<void> {
  const name = title.replace(/ · Januslens$/, '').replace(/[^\p{L}\p{N}]+/gu, '-')
  if (format === 'json') {
    save(`${name}.jsonl`, 'application/jsonl', `${(await lines(stream)).join('\n')}\n`)
    return
  }
  const pictures = [...document.querySelectorAll<SVGSVGElement>('svg.picture')]
  const svg = standaloneSvg(
    pictures.filter((picture) => picture.clientWidth > 0),
    title,
  )
  if (format === 'svg') save(`${name}.svg`, 'image/svg+xml', svg)
  if (format === 'png') save(`${name}.png`, 'image/png', await png(svg))
}

export function save(name: string, type: string, content: BlobPart): void {
  const url = URL.createObjectURL(new Blob([content], { type }))
  const link = document.createElement('a')
  link.href = url
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(url), 10_000)
}

/** One self-contained SVG of all pictures, stacked, with resolved colours and fonts. */
export function standaloneSvg(pictures: readonly SVGSVGElement[], title: string): string {
  const gap = 24
  const margin = 20
  const width = Math.max(...pictures.map((p) => p.width.baseVal.value)) + 2 * margin
  let y = margin + 30
  const parts = pictures.map((picture) => {
    const copy = resolvedCopy(picture)
    copy.setAttribute('x', String(margin))
    copy.setAttribute('y', String(y))
    y += picture.height.baseVal.value + gap
    return new XMLSerializer().serializeToString(copy)
  })
  const heading = document.createElementNS('http://www.w3.org/2000/svg', 'text')
  heading.setAttribute('x', String(margin))
  heading.setAttribute('y', String(margin + 12))
  heading.setAttribute('class', 'title')
  heading.textContent = title
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${y}">` +
    `<style>${resolvedStyle()}</style><rect width="100%" height="100%" fill="${resolvedColour('--paper')}"/>` +
    `${new XMLSerializer().serializeToString(heading)}${parts.join('')}</svg>`
  )
}

/** A copy with inline colours resolved for the current theme. */
function resolvedCopy(picture: SVGSVGElement): SVGSVGElement {
  const copy = picture.cloneNode(true) as SVGSVGElement
  const copies = copy.querySelectorAll<SVGElement>('[style]')
  picture.querySelectorAll('[style]').forEach((original, i) => {
    const style = copies[i]?.style
    if (style?.fill) style.fill = getComputedStyle(original).fill
  })
  return copy
}

/** The pictures' style sheet with all variables replaced by their current values. */
function resolvedStyle(): string {
  return pictureStyle.replace(/var\((--[\w-]+)\)/g, (_, name: string) =>
    name === '--mono' || name === '--sans'
      ? getComputedStyle(document.documentElement).getPropertyValue(name)
      : resolvedColour(name),
  )
}

/** Renders an SVG as PNG at twice its size, for slides. */
export async function png(svg: string): Promise<Blob> {
  const image = new Image()
  const url = URL.createObjectURL(new Blob([svg], { type: 'image/svg+xml' }))
  image.src = url
  await image.decode()
  const canvas = document.createElement('canvas')
  canvas.width = image.naturalWidth * 2
  canvas.height = image.naturalHeight * 2
  canvas.getContext('2d')?.drawImage(image, 0, 0, canvas.width, canvas.height)
  URL.revokeObjectURL(url)
  return new Promise((resolve, reject) =>
    canvas.toBlob(
      (blob) =>
        blob ? resolve(blob) : reject(new Error('the browser could not render the picture')),
      'image/png',
    ),
  )
}
