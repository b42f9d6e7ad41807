// Bundles the pages' program and style, and lists the licences of what went into them.
// `node build.mjs [FOLDER]`; the default is where the wheel takes them from.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { build } from 'esbuild'

const here = dirname(fileURLToPath(import.meta.url))
const out = process.argv[2] ?? join(here, '../januslens/viewer/assets')
mkdirSync(out, { recursive: true })

const common = {
  absWorkingDir: here,
  bundle: true,
  minify: true,
  outdir: out,
  charset: 'ascii', // the page is right whatever encoding a server claims for it
  legalComments: 'none', // they are all in LICENSES.txt
  metafile: true,
}
await build({ ...common, entryPoints: { viewer: 'styles/page.css' } })
const result = await build({
  ...common,
  entryPoints: { viewer: 'src/main.ts' },
  format: 'iife',
  target: 'es2022',
  loader: { '.css': 'text' }, // a picture that leaves the page takes its style with it
})
writeFileSync(join(out, 'LICENSES.txt'), licences(Object.keys(result.metafile.inputs)))

/** The licence texts of every package that the bundle has code of. */
function licences(inputs) {
  const packages = new Set()
  for (const input of inputs) {
    const match = input.match(/node_modules\/((?:@[^/]+\/)?[^/]+)\//)
    if (match) packages.add(match[1])
  }
  const texts = [...packages].sort().map((name) => {
    const folder = join(here, 'node_modules', name)
    const { version, license } = JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'))
    const text = readFileSync(join(folder, 'LICENSE'), 'utf8').trim()
    return `${name} ${version} (${license})\n\n${text}\n`
  })
  return `viewer.js contains code of these packages.\n\n${texts.join(`\n${'-'.repeat(72)}\n\n`)}`
}
